"""The package's tests, in the folders of the code; what several folders share is in `support`."""
