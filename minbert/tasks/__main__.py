"""Describe a tasks file and its data: `minbert tasks FILE`."""

from minbert import cli
from minbert.describe_tasks import main

if __name__ == "__main__":
    cli.run(main)
