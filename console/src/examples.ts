// Three made-up conversations to begin with.
import { fromLines } from "./turns";

export const EXAMPLES = [
  {
    title: "A table for four",
    turns: fromLines(`Customer: Hi, I need a table for four in San Jose on Friday.
Agent: Bella Mia has one at 7 pm. Shall I book it?
Customer: Is there anything else, maybe Mexican?
Agent: Iguanas has a table at 7:30 pm.
Customer: Yes, please book that one.
Agent: Done. Your table at Iguanas is reserved for Friday, 7:30 pm.
Customer: Great, thank you, that was all. Bye!`),
  },
  {
    title: "An order that never came",
    turns: fromLines(`Customer: My order never came, and nobody answers my mails.
Agent: I am sorry. What is the number of the order?
Customer: It is 20417.
Agent: The parcel was lost. I have sent a new one today; it arrives on Tuesday.
Customer: I leave on Monday! That does not help me at all.
Agent: I can send it to a shop near you for Saturday instead.
Customer: All right, do that.`),
  },
  {
    title: "A flight to change",
    turns: fromLines(`Customer: Can I move my flight to Lisbon from the 3rd to the 5th?
Agent: Yes. The morning flight on the 5th costs 40 more, the evening one costs nothing.
Customer: How long does the evening one take?
Agent: Two hours and ten minutes, arriving at 21:40.
Customer: Then the evening one. And can you add a suitcase?`),
  },
];
