"""The systems that the paper compares with, one file each, written from their papers and sharing Table 4's generator."""
