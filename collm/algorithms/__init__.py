"""The maths: tensors in, tensors out. Every formula is one pure function with its equation, shapes and source."""
