//! The rules of the two machines, one test a rule.

mod audit;
mod membership;
mod participant;
mod replay;
mod restart;
mod results;
mod table;
