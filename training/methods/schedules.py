class Constant:
    def factor(self, t):
        return 1.0


class MultiStep(Constant):
    def __init__(self, milestones: tuple[float, ...] = (0.5, 0.75), gamma: float = 0.1, *, updates: int = 1): ...


class Cosine(Constant):
    def __init__(self, *, updates: int = 1): ...
