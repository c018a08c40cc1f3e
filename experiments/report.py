"""`jaxcl report`, as a module: python -m experiments.report [--flag=value ...]"""

from jaxcl.commands.report import command

if __name__ == "__main__":
    command()
