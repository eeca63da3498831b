"""Files that exports contain. They run without gflowtrl: each one imports only the libraries that it names."""
