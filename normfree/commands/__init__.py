"""One file per kind of verb: its words, its call, its printing. torch is imported only inside the functions."""
