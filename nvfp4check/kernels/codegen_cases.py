"""Every kernel of the project as a case for the compiler, by name."""

from nvfp4check.kernels.codegen_case import Case
from nvfp4check.kernels.codegen_elementwise import ELEMENTWISE
from nvfp4check.kernels.codegen_products import PRODUCTS

CASES: dict[str, Case] = {case.name: case for case in (*ELEMENTWISE, *PRODUCTS)}
