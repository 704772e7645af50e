"""Sample lengths to rows, and the order in which rows are trained. Pure numpy."""
