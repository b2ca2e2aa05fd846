"""Faults that the tests bring about one by one: each has a number, and the same has to hold after all of them."""
