"""A training as a YAML file: its fields, what they are checked for, and what is made of them."""
