"""Operations for PyTorch; each is one custom operator, so that torch.export and torch.compile keep it whole."""
