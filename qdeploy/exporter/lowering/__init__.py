"""What front ends share: rules from operators to layers, in numpy. A front end says what an operator of its source is.

site          where an operator stands in the source, and what is said where it cannot be lowered
moved         a tensor whose elements are those of an activation, elsewhere
elementwise   functions of one tensor, sums, products, constants
weighted, norms, windows
"""
