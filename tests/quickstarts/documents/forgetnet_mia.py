# ForgetNet's two examples of LanguageMIA, as they stand there: only `forgetnet` has become
# `dptorch.compat.forgetnet`. Model, tokenizer, data sets and evaluate_perplexity are given. Run by
# test_forgetnet.py.

from dptorch.compat.forgetnet import LanguageMIA

mia = LanguageMIA()
results = mia.attack(train_dataset, test_dataset, model, tokenizer)

print(f"ROC AUC: {results['roc_auc']:.4f}")
print(f"Precision-Recall AUC: {results['precision_recall_auc']:.4f}")
print(f"Best model: {results['best_model']}")
print(f"Optimal threshold: {results['optimal_threshold']:.4f}")

def evaluate_model(model, train_dataset, test_dataset, tokenizer):
    mia = LanguageMIA()
    mia_results = mia.attack(train_dataset, test_dataset, model, tokenizer)

    perplexity = evaluate_perplexity(model, test_dataset, tokenizer)

    results = {
        'perplexity': perplexity,
        'mia_results': mia_results,
    }
    return results

evaluation_results = evaluate_model(model, train_dataset, test_dataset, tokenizer)
print(f"Model Perplexity: {evaluation_results['perplexity']:.2f}")
print(f"MIA ROC-AUC: {evaluation_results['mia_results']['roc_auc']:.4f}")
