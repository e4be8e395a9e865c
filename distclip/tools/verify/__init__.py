"""Behind ``distclip verify``: layouts x policies x dtypes x ranks against the float64 oracle."""
