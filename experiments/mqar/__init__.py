"""Multi-query associative recall, the synthetic recall task of Zoology (arXiv:2312.04927)."""
