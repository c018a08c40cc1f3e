"""`jaxcl configs`, as a module: python -m experiments.configs [--flag=value ...]"""

from jaxcl.commands.configs import command

if __name__ == "__main__":
    command()
