"""The int8 engine: C++ sources, how they are built, and the C functions as Python sees them."""
