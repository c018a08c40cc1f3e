"""`jaxcl pairs`, as a module: python -m experiments.pairs [--flag=value ...]"""

from jaxcl.commands.pairs import command

if __name__ == "__main__":
    command()
