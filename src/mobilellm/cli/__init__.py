"""The command line: one file a verb; the only place that knows printing and exit codes.

main.py has the table of verbs. A verb's file is called as it is typed: eval_ppl.py is `mobilellm eval ppl`,
report_artefacts.py `mobilellm report artefacts`. What only one verb needs begins with its name. Beside them:

  what is typed            parse.py, complaints.py, guesses.py; engine_flags.py, recipe_flags.py
  what is printed          tables.py, notices.py
  which model is meant     subject.py (info, cost), eval_model.py (all of eval)
  export and verify        comparison.py
  a run of training        run_parts.py: what its recipe names, built; run_folder.py: the folder it leaves
    what it reads          shard_text.py (pretraining), conversation_text.py (finetune, …)
    a table of its recipe  distill_parts.py with teachers.py, lora_parts.py, qat_parts.py
    --plan                 plan_sheet.py
"""
