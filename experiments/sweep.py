"""`jaxcl sweep`, as a module: python -m experiments.sweep [--flag=value ...]"""

from jaxcl.commands.sweep import command

if __name__ == "__main__":
    command()
