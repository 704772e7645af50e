"""Starts groups of rank processes on this machine, for the proof, verification and tests."""
