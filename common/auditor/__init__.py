"""The auditor, who has no patient data: recomputes every claim from ledgers (`xfed-audit`)."""
