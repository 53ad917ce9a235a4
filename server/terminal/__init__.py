"""`octavo chat`: a client like any other, which knows the server by HTTP only."""
