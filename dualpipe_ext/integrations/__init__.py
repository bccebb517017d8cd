"""Our stages and pairs under other people's pipeline runtimes; import the one you use."""
