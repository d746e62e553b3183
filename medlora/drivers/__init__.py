"""What a command does, from plan to report; they import no ray themselves."""
