"`python -m gla_nb` prints a report for questions. Written by hand, as `__init__.py` is."

from gla_nb.report import report

if __name__ == "__main__":
    print(report())
