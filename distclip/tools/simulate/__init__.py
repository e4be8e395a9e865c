"""Behind ``distclip simulate``: launch the user's script on gloo ranks, watch, compare.

``running`` runs the layouts one after another. ``task`` is what the ranks are given, ``rank`` what
each process runs around the script, and ``recorder`` what it writes down there.
``layouts`` says how a layout is launched, ``nodes`` puts nodes into network namespaces, ``watch``
follows a launch to its end. ``records`` reads what the ranks wrote, ``findings`` compares the ranks
of one launch, ``stuck`` says who hangs where, ``agreement`` compares layouts, ``shown`` prints.
"""
