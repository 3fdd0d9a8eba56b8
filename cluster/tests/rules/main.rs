//! The rules of the two machines, one test a rule.

mod audit;
mod faulty;
mod membership;
mod participant;
mod progress;
mod replay;
mod resize;
mod restart;
mod results;
mod table;
