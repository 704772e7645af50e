"""What a run says about itself: records of steps and validations, and where they are written."""
