"""Other people's objects: how fastft knows a wrapped model, a sharded tensor, a `datasets.Dataset`,
a private name.

Everything is asked of the object, or of `sys.modules`: no library is imported to learn that an
object is not its own.
"""
