"""The options of the stack that trains a branch in place of this stage."""
