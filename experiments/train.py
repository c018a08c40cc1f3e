"""`jaxcl train`, as a module: python -m experiments.train [--flag=value ...]"""

from jaxcl.commands.train import command

if __name__ == "__main__":
    command()
