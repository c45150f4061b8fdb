"""The command line: entry point, help, suggestions and completion."""
