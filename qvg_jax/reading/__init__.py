"""What comes from outside, read with limits: JSON, arrays of NumPy, safetensors.

Each reader looks at sizes and headers first and refuses before it allocates; what it returns has the
types and ranges of a schema. Everything that is wrong with a file is a `UserError` that names the file.
"""
