"""memeff inside of other packages, one file for each; nothing here is imported without need.

Where a package's private function is replaced, its file names the versions that it was tested with,
and raises an error if that function is not what it was there.
"""
