"""The command line: entry point, command server, help, suggestions and completion."""
