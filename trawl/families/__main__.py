"""Write the page about families to standard output."""

import sys

from trawl.families.table import render

if __name__ == "__main__":
    sys.stdout.write(render())
