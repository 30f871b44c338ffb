"""Data-parallel replicas behind one client: which replica a request goes to, and what each of them carries."""
