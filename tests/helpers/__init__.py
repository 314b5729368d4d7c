"""Problems whose solutions and hypergradients are known, and how to compare with them."""
