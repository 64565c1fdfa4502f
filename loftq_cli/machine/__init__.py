"""What the machine gives: durable files, disk, memory, threads, terminals, packages."""
