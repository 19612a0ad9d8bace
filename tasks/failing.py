"""Fails with a traceback, to show what a failed task looks like."""


def divide(dividend: int, divisor: int) -> float:
    return dividend / divisor


print("About to divide by zero")
print(divide(1, 0))
