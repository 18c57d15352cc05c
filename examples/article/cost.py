"""The article's cost: an endpoint for each classifier against one endpoint for all, for a month of 30 days.

python examples/article/cost.py
python examples/article/cost.py --classifiers 40 --instance-type ml.g6.2xlarge --instances 2
"""

import argparse
from pathlib import Path

import yaml

PRICES = Path(__file__).with_name("prices.yaml")
HOURS = 24 * 30

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--classifiers", type=int, default=16)
parser.add_argument("--instance-type", default="ml.g5.2xlarge")
parser.add_argument("--instances", type=int, default=1, help="how many instances all classifiers need together")
asked = parser.parse_args()

prices = yaml.safe_load(PRICES.read_text(encoding="utf-8"))
if asked.instance_type not in prices:
    parser.error(f"{PRICES.name} has no price of {asked.instance_type}; it has: {', '.join(prices)}")
price = prices[asked.instance_type]
separate = asked.classifiers * price * HOURS
together = asked.instances * price * HOURS
print(f"{asked.classifiers} endpoints: {asked.classifiers} x ${price}/h x {HOURS} h = ${separate:,.2f} a month")
print(f"{asked.instances} for all:    {asked.instances} x ${price}/h x {HOURS} h = ${together:,.2f} a month")
print(f"saved: ${separate - together:,.2f} ({1 - together / separate:.2%})")
