"""`jaxcl compare`, as a module: python -m experiments.compare [--flag=value ...]"""

from jaxcl.commands.compare import command

if __name__ == "__main__":
    command()
