"""The engine in C++: entries, segments and rules as structs of merit_fast._C."""
