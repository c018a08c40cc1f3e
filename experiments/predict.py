"""`jaxcl predict`, as a module: python -m experiments.predict [--flag=value ...]"""

from jaxcl.commands.predict import command

if __name__ == "__main__":
    command()
