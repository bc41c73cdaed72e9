"""What the paper prints: Table 1 (appendix B), half squared errors above those of the best ridge regression."""

PROBLEMS = (*(f"uniform:{top}" for top in range(8)), "levels:1,3", "levels:1,3,5")

_TABLE = """
1 gdpp     1.768 1.639 1.396 1.175 1.015 .907 .841 .806 1.007 .819
1 diagonal 1.767 1.639 1.396 1.175 1.015 .906 .841 .806 1.007 .819
1 full     1.768 1.640 1.397 1.176 1.016 .907 .842 .806 1.008 .820
2 gdpp     .341 .295 .243 .265 .347 .366 .440 .530 .305 .427
2 diagonal .265 .214 .173 .188 .219 .242 .254 .259 .201 .246
2 full     .264 .215 .173 .188 .220 .245 .259 .263 .202 .276
3 gdpp     .019 .021 .071 .161 .259 .344 .454 .530 .222 .422
3 diagonal .013 .015 .048 .087 .109 .118 .121 .123 .098 .119
3 full     .012 .015 .049 .075 .101 .117 .124 .127 .076 .113
4 gdpp     9.91e-5 .014 .066 .160 .258 .344 .454 .530 .222 .422
4 diagonal 1.19e-4 .006 .024 .041 .050 .059 .065 .073 .043 .062
4 full     1.63e-4 .005 .021 .038 .052 .065 .068 .076 .032 .061
5 gdpp     1.14e-7 .014 .066 .161 .265 .344 .454 .530 .222 .422
5 diagonal 1.81e-7 .004 .016 .029 .041 .051 .058 .062 .026 .051
5 full     1.79e-7 .002 .015 .026 .038 .048 .059 .065 .016 .048
6 gdpp     2.37e-10 .009 .066 .161 .265 .344 .454 .530 .222 .422
6 diagonal 2.57e-10 .003 .014 .028 .040 .048 .054 .059 .020 .047
6 full     2.71e-10 .002 .014 .025 .036 .044 .052 .059 .011 .043
7 gdpp     2.65e-12 .009 .066 .161 .265 .344 .454 .530 .222 .422
7 diagonal 2.50e-12 .002 .014 .027 .040 .047 .052 .059 .018 .046
7 full     2.50e-12 .002 .010 .025 .035 .047 .050 .057 .010 .035
- ConstRR  0 .009 .066 .161 .265 .365 .454 .530 .222 .422
- AdaRR    0 .003 .016 .034 .053 .068 .081 .092 .051 .084
- TunedRR  0 .002 .010 .023 .037 .049 .060 .068 .021 .054
"""


def _parse() -> tuple[dict[tuple[int, str, str], float], dict[tuple[str, str], float]]:
    models, baselines = {}, {}
    for line in _TABLE.split("\n")[1:-1]:
        layers, name, *numbers = line.split()
        for problem, number in zip(PROBLEMS, numbers, strict=True):
            if layers == "-":
                baselines[name, problem] = float(number)
            else:
                models[int(layers), name, problem] = float(number)
    return models, baselines


TABLE1, TABLE1_BASELINES = _parse()
"""Adjusted losses by `(layers, form, problem)`, and by `(baseline, problem)`."""


def problem_name(problem: str) -> str:
    """As the paper writes it: `U(0, 5)`, `{1, 3}`."""
    kind, _, numbers = problem.partition(":")
    return f"U(0, {numbers})" if kind == "uniform" else f"{{{numbers.replace(',', ', ')}}}"
