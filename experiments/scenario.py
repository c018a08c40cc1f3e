"""`jaxcl scenario`, as a module: python -m experiments.scenario [--flag=value ...]"""

from jaxcl.commands.scenario import command

if __name__ == "__main__":
    command()
