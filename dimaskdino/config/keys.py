"""Every configuration key that this package adds to detectron2's, with its default.

Keys of the public MaskDINO and DI-MaskDINO releases keep their names, so that their YAML files load unchanged.
"""

import copy
from collections.abc import Mapping
from typing import Any

from detectron2.config import CfgNode

from dimaskdino.errors import ConfigError

KEYS: dict[str, Any] = {
    # The modules that --import named, as the run wrote them to its config.yaml; reading the file imports nothing.
    "IMPORTS": [],
    # --- Data ---
    # Training mapper, by registered name: coco_instance_lsj, coco_instance_detr, or, with boxes alone,
    # coco_detection_detr; coco_panoptic_lsj for panoptic datasets, mask_former_semantic for semantic ones.
    "INPUT.DATASET_MAPPER_NAME": "coco_instance_lsj",
    # SSD's photometric distortion before the geometric augmentations.
    "INPUT.COLOR_AUG_SSD": False,
    # Large-scale jitter: side of the square canvas in pixels.
    "INPUT.IMAGE_SIZE": 1024,
    # Large-scale jitter: range of the random scale.
    "INPUT.MIN_SCALE": 0.1,
    "INPUT.MAX_SCALE": 2.0,
    # Turn photos upright as their EXIF orientation says; False reads the pixels as stored, for labels drawn on those.
    "INPUT.APPLY_EXIF": True,
    # What reads images: "" is PIL, 8 bits a channel. NumpyReader, OpenCvReader (16 bits), TiffReader, Hdf5Reader, or
    # one of a user's own (READER_REGISTRY) read any numbers and channels, as many as MODEL.PIXEL_MEAN has; "auto"
    # chooses by extension. Their channels keep their order, so INPUT.FORMAT does not count.
    "INPUT.READER": "",
    # Training augmentations in place of those of the mapper, in their order: names (AUGMENTATION_REGISTRY, CopyPaste,
    # or of Albumentations), or names with arguments, as {Rotate: {angle: [-30, 30]}}. INPUT's other keys of
    # augmentations then do not count. CopyPaste comes last wherever it stands.
    "INPUT.AUGMENTATIONS": [],
    # Refuse a dataset of which training would drop more than this share of the objects, or all objects of a class,
    # because nothing of them is in their image; 1 accepts any loss. Crowd regions do not count.
    "DATASETS.MAX_DROPPED_SHARE": 0.1,
    # mask_former_semantic: largest share of a crop that one class may cover (1 switches that off), and the side in
    # pixels of the square that crops are padded to (-1 for none). MODEL.SEM_SEG_HEAD.IGNORE_VALUE (255) is the label of
    # pixels without a class.
    "INPUT.CROP.SINGLE_CATEGORY_MAX_AREA": 1.0,
    "INPUT.SIZE_DIVISIBILITY": -1,
    # A dataset of your own in COCO's format: the annotation files, and the folders that their file names are relative
    # to, of own_train and own_val. TRAIN_JSON also sets DATASETS.TRAIN and TEST and the number of classes; without
    # VAL_JSON, the training images are evaluated.
    "DATASETS.TRAIN_JSON": "",
    "DATASETS.TRAIN_IMAGES": "",
    "DATASETS.VAL_JSON": "",
    "DATASETS.VAL_IMAGES": "",
    # A panoptic dataset of your own in COCO's form: the JSON file, the folder of PNGs, and the folder of images of
    # panoptic_train and panoptic_val.
    "DATASETS.PANOPTIC.TRAIN_JSON": "",
    "DATASETS.PANOPTIC.TRAIN_LABELS": "",
    "DATASETS.PANOPTIC.TRAIN_IMAGES": "",
    "DATASETS.PANOPTIC.VAL_JSON": "",
    "DATASETS.PANOPTIC.VAL_LABELS": "",
    "DATASETS.PANOPTIC.VAL_IMAGES": "",
    # A semantic dataset of your own: the class names by label, from 0 on, and the folders of images and of label maps
    # (PNGs of the same names, with the class number of each pixel) of semantic_train and semantic_val.
    "DATASETS.SEMANTIC.CLASSES": [],
    "DATASETS.SEMANTIC.TRAIN_IMAGES": "",
    "DATASETS.SEMANTIC.TRAIN_LABELS": "",
    "DATASETS.SEMANTIC.VAL_IMAGES": "",
    "DATASETS.SEMANTIC.VAL_LABELS": "",
    # With DATALOADER.ASPECT_RATIO_GROUPING: images of one kind that come together. 0 means the share of a process, so
    # that runs of one and of two processes have other batches; a fixed number, which divides SOLVER.IMS_PER_BATCH,
    # gives them the same ones.
    "DATALOADER.ASPECT_RATIO_GROUP_SIZE": 0,
    # Train and evaluate on the first images of each list of datasets, to try things; 0 means all.
    "DATASETS.MAX_IMAGES": 0,
    # Folder of the synthetic dataset; "" means OUTPUT_DIR/shapes unless $DETECTRON2_DATASETS/shapes already holds it.
    "DATASETS.SHAPES.ROOT": "",
    # Synthetic images in shapes_train and in shapes_val.
    "DATASETS.SHAPES.NUM_TRAIN": 2000,
    "DATASETS.SHAPES.NUM_VAL": 200,
    # Side of the square synthetic images in pixels.
    "DATASETS.SHAPES.IMAGE_SIZE": 128,
    # Seed of the synthetic images.
    "DATASETS.SHAPES.SEED": 0,
    # Boxes of the annotations as the box targets of objects with masks too; otherwise a mask's extent is its box.
    "INPUT.BOXES_OF_ANNOTATIONS": False,
    # Read the keys neg_category_ids and not_exhaustive_category_ids of images, as in LVIS: classes that were not looked
    # for, or of which some objects may lack labels, are then no false positives in an image.
    "INPUT.PARTIAL_LABELS": False,
    # Number fields of annotations that reach the targets: Targets.fields[NAME] in losses, gt_NAME in evaluators.
    "INPUT.ANNOTATION_FIELDS": [],
    # Share of drawn images that have no objects; -1 means as many as there are. Needs
    # DATALOADER.FILTER_EMPTY_ANNOTATIONS False. DATALOADER.SAMPLER_TRAIN orders the others.
    "DATALOADER.NEGATIVE_SHARE": -1.0,
    # Cross-validation: train on all but one of NUM folds of the datasets in DATASETS.TRAIN, and test on fold FOLD (from
    # 0) of those that DATASETS.TEST names as well. NUM 0 is off. Images of one GROUP stay together: "" is each image by
    # itself, folder those of a folder, or a key of the images in the COCO file, such as patient.
    "DATASETS.FOLDS.NUM": 0,
    "DATASETS.FOLDS.FOLD": 0,
    "DATASETS.FOLDS.SEED": 0,
    "DATASETS.FOLDS.GROUP": "",
    # --- Solver ---
    # Hooks of a user's own, by registered name (HOOK_REGISTRY), in the order in which they run.
    "SOLVER.HOOKS": [],
    # Precision of float32 matrix products: highest, high (TF32 on GPUs that have it), medium, or "" for torch's own.
    # Newer detectron2 has this key too.
    "FLOAT32_PRECISION": "",
    # Length of a training on one's own data (DATASETS.TRAIN_JSON): this many passes over its images, and at least
    # MIN_ITER iterations. SOLVER.STEPS keep their shares of the training; five evaluations and checkpoints follow. The
    # keys that this sets are logged. With 0, or SOLVER.MAX_ITER on the command line, the schedule is as configured.
    "SOLVER.AUTO_SCHEDULE.EPOCHS": 0,
    "SOLVER.AUTO_SCHEDULE.MIN_ITER": 1000,
    # What a step whose costs, losses, gradients or running statistics are not finite does: stop the run, or skip, which
    # goes on without its update and counts (skipped_steps); after 20 in a row, or where a weight is not finite, the run
    # stops. Both write the step to OUTPUT_DIR/nonfinite, for tools/replay.py.
    "SOLVER.NONFINITE": "stop",
    # Seconds that a process of a job waits for another one, which is then named, and the job ends.
    "SOLVER.PROCESS_TIMEOUT": 1800.0,
    # Keep the last checkpoints of SOLVER.CHECKPOINT_PERIOD only, this many; 0 keeps all. The final one and the best one
    # are kept as well.
    "SOLVER.CHECKPOINT_KEEP": 0,
    # With SOLVER.AMP.ENABLED: float16 (with loss scaling; on GPUs alone) or bfloat16 (also on CPUs and in evaluation).
    "SOLVER.AMP.DTYPE": "float16",
    # Compute the IMS_PER_BATCH images of an iteration in this many parts, one after the other, to save memory.
    "SOLVER.ACCUMULATION_STEPS": 1,
    # Parts whose layers are computed again in the backward pass, to save memory: backbone, encoder, decoder.
    "SOLVER.ACTIVATION_CHECKPOINTING": [],
    # What is sharded across the processes of a job: "" nothing, "optimizer" its moments (ZeRO, stage 1), or "full"
    # weights, gradients and moments (FSDP2). Checkpoints are the same.
    "SOLVER.SHARDING": "",
    # Moving average of the weights: evaluated as well, and saved beside them. An average has decay 0.1 after the first
    # iteration, and comes to DECAY in the course of training: it is at most (1 + iteration) / (10 + iteration).
    "SOLVER.EMA.ENABLED": False,
    "SOLVER.EMA.DECAY": 0.9997,
    # Images per iteration that SOLVER.BASE_LR is for: with another IMS_PER_BATCH it is scaled in proportion; 0 never.
    "SOLVER.REFERENCE_BATCH_SIZE": 0,
    # Leave weights that are frozen out of checkpoints; MODEL.WEIGHTS, or the pretrained weights of MODEL.VIT or
    # MODEL.TIMM, must then give the same ones again.
    "SOLVER.CHECKPOINT_WITHOUT_FROZEN": False,
    # Optimizer: ADAMW or SGD.
    "SOLVER.OPTIMIZER": "ADAMW",
    # Factor on the learning rate of every parameter whose module name contains "backbone".
    "SOLVER.BACKBONE_MULTIPLIER": 0.1,
    # Factor on the learning rate from each block of the backbone to the one before; 1 for none. 0.8 is usual for a ViT.
    "SOLVER.LAYER_DECAY": 1.0,
    # Settings of parameters by name: {pattern: "backbone.stem", frozen: True} or {pattern: "*.norm?.*", lr_factor: 0.1,
    # weight_decay: 0.0}. A pattern is a module, or a name with * and ?; of several that match, the later one counts.
    "SOLVER.PARAM_GROUPS": [],
    # Weight decay of nn.Embedding weights.
    "SOLVER.WEIGHT_DECAY_EMBED": 0.0,
    # Polynomial schedule of the releases' semantic configurations (SOLVER.LR_SCHEDULER_NAME WarmupPolyLR): its power,
    # and the fraction of the learning rate that it ends at.
    "SOLVER.POLY_LR_POWER": 0.9,
    "SOLVER.POLY_LR_CONSTANT_ENDING": 0.0,
    # A YAML file beside the configuration that is merged over it where no GPU is used, such as one of a smaller model;
    # not where the command line names MODEL.WEIGHTS, which are of the model as configured.
    "MODEL.ON_CPU": "",
    # --- Logs ---
    # Where records go, by registered name: metrics_json, which --resume needs, tensorboard, wandb, mlflow.
    "LOG.WRITERS": ["metrics_json", "tensorboard"],
    # Project of wandb, experiment of mlflow, and the run's name there; "" means that of OUTPUT_DIR's folder.
    "LOG.PROJECT": "dimaskdino",
    "LOG.NAME": "",
    # Images of the first DATASETS.TEST that are drawn after each evaluation, predictions beside truth; 0 for none.
    "LOG.PICTURES": 4,
    # --- How the model is computed ---
    # Compile the transformer layers of encoder, decoder or both with torch.compile, once for all image sizes.
    "MODEL.COMPILE": [],
    # Keep images and convolution weights in the memory format channels_last.
    "MODEL.CHANNELS_LAST": False,
    # --- Pixel decoder: the paper's encoder ---
    # Pixel decoder, by registered name.
    "MODEL.SEM_SEG_HEAD.PIXEL_DECODER_NAME": "MaskDINOEncoder",
    # Backbone features that the deformable encoder attends to.
    "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res3", "res4", "res5"],
    # Encoder levels, including those that stride-2 convolutions of the coarsest feature add.
    "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 4,
    # Order of the encoder's levels: low2high (finest first) or high2low (coarsest first).
    "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "high2low",
    # Hidden width of the encoder's feed-forward blocks.
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 1024,
    # Encoder layers.
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 0,
    # Channels of the mask features.
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 256,
    # --- Loss weights ---
    "MODEL.MaskDINO.CLASS_WEIGHT": 4.0,
    "MODEL.MaskDINO.DICE_WEIGHT": 5.0,
    "MODEL.MaskDINO.MASK_WEIGHT": 5.0,
    "MODEL.MaskDINO.BOX_WEIGHT": 5.0,
    "MODEL.MaskDINO.GIOU_WEIGHT": 2.0,
    # --- Weights of the matching cost ---
    "MODEL.MaskDINO.COST_CLASS_WEIGHT": 4.0,
    "MODEL.MaskDINO.COST_DICE_WEIGHT": 5.0,
    "MODEL.MaskDINO.COST_MASK_WEIGHT": 5.0,
    "MODEL.MaskDINO.COST_BOX_WEIGHT": 5.0,
    "MODEL.MaskDINO.COST_GIOU_WEIGHT": 2.0,
    # --- Supervision ---
    # Supervise boxes.
    "MODEL.MaskDINO.BOX_LOSS": True,
    # Supervise every decoder layer.
    "MODEL.MaskDINO.DEEP_SUPERVISION": True,
    # Focal loss of classes: weight of the target class, and exponent that plays down easy examples.
    "MODEL.MaskDINO.FOCAL_ALPHA": 0.25,
    "MODEL.MaskDINO.FOCAL_GAMMA": 2.0,
    # Supervise the boxes of thing classes alone. By default stuff has boxes like any other class: what a class covers
    # in an image is one object, and its box encloses all of it. In the matching, stuff boxes always count.
    "MODEL.MaskDINO.PANO_BOX_LOSS": False,
    # Softmax class loss and a class head with a no-object logit, as in the releases' semantic models; with SEMANTIC_ON
    # as the only kind of result.
    "MODEL.MaskDINO.SEMANTIC_CE_LOSS": False,
    # Weight of queries without an object in the softmax class loss.
    "MODEL.MaskDINO.NO_OBJECT_WEIGHT": 0.1,
    # Whether the model predicts masks; a model of boxes alone needs PIXEL_DECODER_NAME DeformableEncoder.
    "MODEL.MaskDINO.PREDICT_MASKS": True,
    # Points of the mask losses and the matcher (PointRend).
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": 112 * 112,
    # Candidates drawn per point that is kept.
    "MODEL.MaskDINO.OVERSAMPLE_RATIO": 3.0,
    # Share of the points taken where the mask is most uncertain.
    "MODEL.MaskDINO.IMPORTANCE_SAMPLE_RATIO": 0.75,
    # --- Long tails, and what was not labeled; of every model ---
    # Weight of each class in the class loss, in their order; [] means 1.
    "MODEL.CLASS_WEIGHTS": [],
    # Predictions of which at least this share of the box, or of the mask, lies in a crowd region are no false positives
    # of its class (of any class for a region with "ignored"), and masks of its class are not judged there; 0 is off.
    "MODEL.IGNORE_CROWD_SHARE": 0.0,
    # --- Parts of a user's own beside those of the model, by registered name ---
    # Heads of every stage's queries (HEAD_REGISTRY), terms of the criterion (LOSS_REGISTRY) and costs of the matcher
    # (COST_REGISTRY).
    "MODEL.EXTRA_HEADS": [],
    "MODEL.EXTRA_LOSSES": [],
    "MODEL.EXTRA_COSTS": [],
    # --- Decoder ---
    # Decoder, by registered name: DIMaskDINODecoder, or MaskDINODecoder (the same with DI and BATO off).
    "MODEL.MaskDINO.TRANSFORMER_DECODER_NAME": "MaskDINODecoder",
    # Attention heads, width, and feed-forward width.
    "MODEL.MaskDINO.NHEADS": 8,
    "MODEL.MaskDINO.HIDDEN_DIM": 256,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 2048,
    # Dropout of the encoder; the decoder has none, as in the releases.
    "MODEL.MaskDINO.DROPOUT": 0.1,
    # Project the encoder's levels by a 1x1 convolution even where their width fits.
    "MODEL.MaskDINO.ENFORCE_INPUT_PROJ": False,
    # Decoder layers, including layer 0 (Eq. 4).
    "MODEL.MaskDINO.DEC_LAYERS": 6,
    # Queries that the decoder refines; the last selection keeps this many tokens.
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 100,
    # Queries from selected tokens (two-stage) rather than learned ones.
    "MODEL.MaskDINO.TWO_STAGE": True,
    # Learned content on top of the selected boxes.
    "MODEL.MaskDINO.LEARN_TGT": False,
    # Predict from the queries before layer 0 as well.
    "MODEL.MaskDINO.INITIAL_PRED": True,
    # First boxes of the queries: no (box head), mask2box or bitmask (from the predicted mask).
    "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no",
    # Denoising: no, standard (class and box) or seg (mask as well).
    "MODEL.MaskDINO.DN": "seg",
    # Registered name of the part that makes denoising queries.
    "MODEL.MaskDINO.DN_NAME": "Denoising",
    # Scale of the denoising noise.
    "MODEL.MaskDINO.DN_NOISE_SCALE": 0.4,
    # Denoising queries.
    "MODEL.MaskDINO.DN_NUM": 100,
    # Pad the denoising queries to DN_NUM, so that every batch has the same number of queries; losses are the same.
    "MODEL.MaskDINO.DN_FIXED_SIZE": False,
    # --- De-Imbalance (Eqs. 1-4) ---
    # Tokens of the first selection.
    "MODEL.MaskDINO.FIRST_SELECTED_QUERIES": 600,
    # Token-interaction layers.
    "MODEL.MaskDINO.TI_LAYERS": 2,
    # De-Imbalance module, by registered name.
    "MODEL.MaskDINO.DI.NAME": "DeImbalance",
    "MODEL.MaskDINO.DI.ENABLED": True,
    # Tokens that each selection keeps; [] means [FIRST_SELECTED_QUERIES, NUM_OBJECT_QUERIES].
    "MODEL.MaskDINO.DI.NUM_SELECTED": [],
    # Draw the position part of the decoder's queries at random (Table 3, with or without DI).
    "MODEL.MaskDINO.DI.RANDOM_POSITION": False,
    # Supervise token interaction on the box refined once; the release applies the shared box head twice.
    "MODEL.MaskDINO.DI.SINGLE_DELTA_BOXES": False,
    # --- Balance-Aware Tokens Optimization (Eqs. 5-8) ---
    # Guiding tokens.
    "MODEL.MaskDINO.NUM_GUIDING_TOKENS": 50,
    # BATO module, by registered name.
    "MODEL.MaskDINO.BATO.NAME": "BalanceAwareTokensOptimization",
    "MODEL.MaskDINO.BATO.ENABLED": True,
    # Tokens that guide: q_bal, t_s2, t_s1, or t_i (De-Imbalance off), as in Table 5.
    "MODEL.MaskDINO.BATO.GUIDANCE": "q_bal",
    # Guiding token generation; without it the selected queries themselves guide (Table 6).
    "MODEL.MaskDINO.BATO.GTG": True,
    # Eqs. 5 to 8 as the paper prints them: two MLPs of the guiding queries, whose sum is key and value. By default as
    # in the release: the mask head and the positional embedding of the boxes.
    "MODEL.MaskDINO.BATO.PAPER_FORM": False,
    # --- Inference ---
    # Also compute the losses of each DATASETS.TEST, averaged over its images, with the same random draws each time.
    "TEST.LOSS": False,
    # Score the results of a batch in a thread while the model computes the next one.
    "TEST.SCORE_IN_BACKGROUND": True,
    # Save model_best.pth whenever this score of an evaluation is the highest so far, for example segm/AP; "" never.
    "TEST.BEST_METRIC": "",
    # Stop after this many evaluations in a row without a higher TEST.BEST_METRIC; 0 means never.
    "TEST.EARLY_STOP_PATIENCE": 0,
    # COCO's AP and AR at further numbers of detections of a class in an image (AP@N, AR@N), and for further ranges of
    # area (AP_NAME, AR_NAME), each [NAME, LEAST, LARGEST] in square pixels.
    "TEST.COCO.LIMITS": [],
    "TEST.COCO.AREA_RANGES": [],
    # Evaluators beside that of each dataset, by registered name (EVALUATOR_REGISTRY).
    "TEST.EVALUATORS": [],
    # Stages to evaluate besides the final one: [] for none, ["all"], or names such as "layer.0".
    "TEST.EVAL_LAYERS": [],
    # Pad images to a multiple of this many pixels.
    "MODEL.MaskDINO.SIZE_DIVISIBILITY": 32,
    # Score instances by class alone (True) or by class times mask quality (False). The spelling is the releases'.
    "MODEL.MaskDINO.TEST.TEST_FOUCUS_ON_BOX": False,
    # Leave out detections whose class score is lower; their masks are never made.
    "MODEL.MaskDINO.TEST.MIN_SCORE": 0.0,
    # From mask logits to masks: direct (once, to the asked size) or two_step (to the padded size, crop, then to the
    # asked size, as in the releases); they agree in all but one pixel of a thousand.
    "MODEL.MaskDINO.TEST.MASK_INTERPOLATION": "direct",
    # Masks in results: bitmask, or rle for images on which bitmaps of all objects do not fit in memory.
    "MODEL.MaskDINO.TEST.MASK_FORMAT": "bitmask",
    # Memory in MiB in which masks are made, chunk by chunk.
    "MODEL.MaskDINO.TEST.MASK_MEMORY_MB": 256,
    # Weights of the predictor: float32, bfloat16, or auto for bfloat16 where the device computes in it by itself.
    "MODEL.MaskDINO.TEST.PRECISION": "float32",
    # Add to each detection the index and the features of its query, and to each image its mean feature.
    "MODEL.MaskDINO.TEST.QUERY_FEATURES": False,
    # Which results to give: instances, semantic (of models with masks), panoptic; several at once are possible.
    "MODEL.MaskDINO.TEST.INSTANCE_ON": True,
    "MODEL.MaskDINO.TEST.SEMANTIC_ON": True,
    "MODEL.MaskDINO.TEST.PANOPTIC_ON": False,
    # The thing classes by index; [] takes them from the dataset's metadata, [-1] means none.
    "MODEL.MaskDINO.THING_CLASSES": [],
    # Panoptic results: queries whose best sigmoid score is above this take part.
    "MODEL.MaskDINO.TEST.OBJECT_MASK_THRESHOLD": 0.0,
    # Panoptic results: least share of its own mask that a query must win to become a segment.
    "MODEL.MaskDINO.TEST.OVERLAP_THRESHOLD": 0.0,
    # Semantic and panoptic results of models with sigmoid scores: let the classes compete in a softmax over the scores,
    # divided by the temperature.
    "MODEL.MaskDINO.TEST.PANO_TRANSFORM_EVAL": True,
    "MODEL.MaskDINO.TEST.PANO_TEMPERATURE": 0.06,
    # Semantic results of models that give no others: enlarge the masks to the image's size before they are summed up,
    # rather than the sum.
    "MODEL.MaskDINO.TEST.SEM_SEG_POSTPROCESSING_BEFORE_INFERENCE": False,
    # --- DINO (MODEL.META_ARCHITECTURE DINO), which reads MODEL.SEM_SEG_HEAD.NUM_CLASSES and these alone ---
    # Encoder and decoder, by registered name.
    "MODEL.DINO.ENCODER_NAME": "DINOEncoder",
    "MODEL.DINO.DECODER_NAME": "DINODecoder",
    # Backbone features that become tokens, and levels including those that stride-2 convolutions add.
    "MODEL.DINO.IN_FEATURES": ["res3", "res4", "res5"],
    "MODEL.DINO.NUM_LEVELS": 4,
    # Width, attention heads, feed-forward width, and dropout of the encoder.
    "MODEL.DINO.HIDDEN_DIM": 256,
    "MODEL.DINO.NHEADS": 8,
    "MODEL.DINO.DIM_FEEDFORWARD": 2048,
    "MODEL.DINO.DROPOUT": 0.0,
    # Layers of encoder and decoder.
    "MODEL.DINO.ENC_LAYERS": 6,
    "MODEL.DINO.DEC_LAYERS": 6,
    # Sine positions of the tokens: ratio of the wavelengths, and what is added to a cell's number; detrex has 10000 and
    # -0.5.
    "MODEL.DINO.PE_TEMPERATURE": 20.0,
    "MODEL.DINO.PE_OFFSET": 0.0,
    # Pad images to a multiple of this many pixels, for backbones that need it (32 for detectron2's FPN).
    "MODEL.DINO.SIZE_DIVISIBILITY": 1,
    # Queries.
    "MODEL.DINO.NUM_QUERIES": 900,
    # Where queries come from: none (learned content and boxes), pure (selected tokens) or mixed (boxes of selected
    # tokens, learned content).
    "MODEL.DINO.QUERY_SELECTION": "mixed",
    # Let the loss of a layer reach the boxes of the layer before.
    "MODEL.DINO.LOOK_FORWARD_TWICE": True,
    # One class head and one box head for all decoder layers; False gives each its own, as in detrex.
    "MODEL.DINO.SHARED_HEADS": True,
    # Denoising: contrastive, plain (no negatives) or no.
    "MODEL.DINO.DN": "contrastive",
    # Registered name of the part that makes denoising queries.
    "MODEL.DINO.DN_NAME": "ContrastiveDenoising",
    # Denoising queries of an image; contrastive denoising has as many positives and as many negatives.
    "MODEL.DINO.DN_NUM": 100,
    # Pad the denoising queries to twice DN_NUM (plain: once), so that every batch has the same number of queries. The
    # losses are the same, but of an image with more than DN_NUM objects, only as many are denoised.
    "MODEL.DINO.DN_FIXED_SIZE": False,
    # A label is redrawn with half this probability.
    "MODEL.DINO.DN_LABEL_NOISE": 0.5,
    # Scale of the box noise. The paper and the release's files say 0.4, but its trainings all ran with 1.0.
    "MODEL.DINO.DN_BOX_NOISE": 1.0,
    # Loss weights, and weights of the matching cost.
    "MODEL.DINO.CLASS_WEIGHT": 1.0,
    "MODEL.DINO.BOX_WEIGHT": 5.0,
    "MODEL.DINO.GIOU_WEIGHT": 2.0,
    "MODEL.DINO.COST_CLASS_WEIGHT": 2.0,
    "MODEL.DINO.COST_BOX_WEIGHT": 5.0,
    "MODEL.DINO.COST_GIOU_WEIGHT": 2.0,
    # Focal loss of classes: weight of the target class, and exponent that plays down easy examples.
    "MODEL.DINO.FOCAL_ALPHA": 0.25,
    "MODEL.DINO.FOCAL_GAMMA": 2.0,
    # --- timm's backbones (MODEL.BACKBONE.NAME build_timm_backbone) ---
    # Any timm model that supports features_only.
    "MODEL.TIMM.NAME": "resnet50",
    # Download timm's pretrained weights.
    "MODEL.TIMM.PRETRAINED": False,
    # Features to return: res2 to res5 at strides 4 to 32.
    "MODEL.TIMM.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    # Stochastic depth of the last block.
    "MODEL.TIMM.DROP_PATH_RATE": 0.0,
    # --- timm's plain vision transformers, through ViTDet's pyramid (MODEL.BACKBONE.NAME build_vit_backbone) ---
    "MODEL.VIT.NAME": "vit_base_patch16_224",
    # Download timm's pretrained weights.
    "MODEL.VIT.PRETRAINED": False,
    # Features to return, and their channels.
    "MODEL.VIT.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    "MODEL.VIT.OUT_CHANNELS": 256,
    # Stochastic depth of the last block.
    "MODEL.VIT.DROP_PATH_RATE": 0.0,
    # Train the pyramid alone.
    "MODEL.VIT.FREEZE": False,
    # LoRA by peft: the rank of the adapters (0 for none), their scale, and the names of the layers that get them. The
    # transformer's own weights are then frozen.
    "MODEL.VIT.LORA.RANK": 0,
    "MODEL.VIT.LORA.ALPHA": 16.0,
    "MODEL.VIT.LORA.LAYERS": ["qkv", "proj"],
    # --- The releases' Swin (MODEL.BACKBONE.NAME D2SwinTransformer) ---
    # Side in pixels of the images it was pretrained on; only the absolute position embedding depends on it.
    "MODEL.SWIN.PRETRAIN_IMG_SIZE": 224,
    # Side of a patch in pixels.
    "MODEL.SWIN.PATCH_SIZE": 4,
    # Channels of the first stage; each later stage has twice as many.
    "MODEL.SWIN.EMBED_DIM": 96,
    # Blocks of each stage.
    "MODEL.SWIN.DEPTHS": [2, 2, 6, 2],
    # Attention heads of each stage.
    "MODEL.SWIN.NUM_HEADS": [3, 6, 12, 24],
    # Side of an attention window in patches.
    "MODEL.SWIN.WINDOW_SIZE": 7,
    # Hidden width of the MLPs over their input width.
    "MODEL.SWIN.MLP_RATIO": 4.0,
    # Bias of queries, keys and values.
    "MODEL.SWIN.QKV_BIAS": True,
    # Scale of the attention logits; None means one over the square root of the head width.
    "MODEL.SWIN.QK_SCALE": None,
    # Dropout of the activations and of the attention weights.
    "MODEL.SWIN.DROP_RATE": 0.0,
    "MODEL.SWIN.ATTN_DROP_RATE": 0.0,
    # Stochastic depth of the last block.
    "MODEL.SWIN.DROP_PATH_RATE": 0.3,
    # Absolute position embedding.
    "MODEL.SWIN.APE": False,
    # Normalize the patch embedding.
    "MODEL.SWIN.PATCH_NORM": True,
    # Features to return: res2 to res5 at strides 4 to 32.
    "MODEL.SWIN.OUT_FEATURES": ["res2", "res3", "res4", "res5"],
    # Recompute activations in the backward pass to save memory.
    "MODEL.SWIN.USE_CHECKPOINT": False,
}

# Keys of which "no" is a value.
MAY_BE_NO = ("MODEL.MaskDINO.INITIALIZE_BOX_TYPE", "MODEL.MaskDINO.DN", "MODEL.DINO.DN")


def add_dimaskdino_config(cfg: CfgNode) -> None:
    """Add every key of this package to ``cfg`` in place."""
    add_keys(cfg, KEYS)


def add_keys(cfg: CfgNode, keys: Mapping[str, Any]) -> None:
    """Add keys by their dotted names, each with its default, in place; missing nodes are made.

    Raises:
        ConfigError: a key has the name of a node, or lies below another key.
    """
    for key, default in keys.items():
        *parents, name = key.split(".")
        node = cfg
        for parent in parents:
            node = node.setdefault(parent, CfgNode())
            if not isinstance(node, CfgNode):
                raise ConfigError(f"Cannot add the key {key}: {parent} is a key itself.")
        if isinstance(node.get(name), CfgNode):
            raise ConfigError(f"Cannot add the key {key}: other keys lie below it.")
        node[name] = copy.deepcopy(default)
