"""One file per framework, each the only importer of that framework."""
