"""From files and datasets to conversations and raw texts: what is read, and in which shapes."""
