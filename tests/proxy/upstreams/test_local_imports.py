import subprocess
import sys


def test_importing_the_local_upstream_costs_no_torch() -> None:
    """A gateway with a hosted upstream imports this module's neighbours, and may not even have torch."""
    program = (
        "import sys; import proxy.upstreams.local; "
        "print([name for name in ('torch', 'transformers', 'jinja2') if name in sys.modules])"
    )
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert output.stdout.strip() == "[]"
