"""Behind ``distclip bench``: clipping measured against its peers, in one run and in turn."""
